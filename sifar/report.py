"python -m sifar.report: see runs/report.py"
from .runs.report import main

if __name__ == "__main__": main()
