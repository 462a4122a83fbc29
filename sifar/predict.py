"python -m sifar.predict: see share/predict.py"
from .cli import start

if __name__ == "__main__": start("sifar.share.predict")
