"sifar-train, sifar-export and sifar-app, which pip makes: each runs train.py, export.py or app.py."
import runpy

from .files import ROOT


def train(): run("train.py")
def export(): run("export.py")
def app(): run("app.py")


def run(script):
    "What `python SCRIPT` does."
    runpy.run_path(str(ROOT / script), run_name="__main__")
