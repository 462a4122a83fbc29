"python -m sifar.compare: see runs/compare.py"
from .runs.compare import main

if __name__ == "__main__": main()
