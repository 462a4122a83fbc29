"python -m sifar.check: see runs/check.py"
from .cli import start

if __name__ == "__main__": start("sifar.runs.check")
