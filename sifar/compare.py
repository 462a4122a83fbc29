"python -m sifar.compare: see runs/compare.py"
from .cli import start

if __name__ == "__main__": start("sifar.runs.compare")
