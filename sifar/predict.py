"python -m sifar.predict: see share/predict.py"
from .share.predict import main

if __name__ == "__main__": main()
