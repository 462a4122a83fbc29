"python -m sifar.check: see runs/check.py"
from .runs.check import main

if __name__ == "__main__": main()
