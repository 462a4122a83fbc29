"python -m sifar.report: see runs/report.py"
from .cli import start

if __name__ == "__main__": start("sifar.runs.report")
