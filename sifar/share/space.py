"""A run as a Hugging Face Space: a folder that is complete, and its upload."""
import json
import platform
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

from ..errors import UserError
from ..files import ROOT, write_file
from ..log import log

NEEDED = "fastai", "fastcore", "gradio", "matplotlib", "numpy", "pillow", "rich", "safetensors", "torch", "torchvision"      # what the page imports
LICENSE = "apache-2.0"


def write_space(run, folder):
    """Write a complete Space that shows the exported `run` into `folder`, which is empty, new, or an earlier Space.

    Errors: UserError where something else is in it."""
    run, folder = Path(run), check_folder(folder)
    about = json.loads((run / "model.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "README.md", front_matter(about) + model_card(about))           # first: it says that the folder is ours, should the rest break off
    if (folder / "sifar").is_dir(): shutil.rmtree(folder / "sifar")             # so that no module of an older sifar stays
    for path in space_files():
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        write_file(copy, path.read_bytes())
    for name in ("learner.pkl", "model.json"): write_file(folder / name, (run / name).read_bytes())
    write_file(folder / "requirements.txt", requirements(about))
    write_file(folder / ".gitattributes", "*.pkl filter=lfs diff=lfs merge=lfs -text\n*.png filter=lfs diff=lfs merge=lfs -text\n")
    log.info("%s is a complete Space: python app.py starts it there", folder)


def check_folder(folder):
    "`folder`, where a Space may be written into it. Errors: UserError."
    folder = Path(folder)
    ours = (folder / "README.md").is_file() and (folder / "README.md").read_bytes().startswith(b"---\ntitle: \"sifar ")
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()) and not ours:
        raise UserError(f"{folder} holds something else than a Space: choose a new folder.")
    return folder


def space_files(): return [ROOT / "app.py", ROOT / "LICENSE", *sorted((ROOT / "sifar").rglob("*.py")), *sorted((ROOT / "examples").glob("*.png"))]


def requirements(about):
    "The exact versions that are installed here, of what the page needs and no more."
    needed = (*NEEDED, *(["timm"] if about["arch"].startswith("timm:") else []))
    return "".join(f"{o}=={version(o).split('+')[0]}\n" for o in needed)


def front_matter(about):
    return f"""---
title: {json.dumps("sifar " + about["dataset"])}
emoji: 🔎
colorFrom: green
colorTo: blue
sdk: gradio
sdk_version: {version("gradio")}
python_version: "{platform.python_version().rpartition(".")[0]}"
app_file: app.py
license: {LICENSE}
---
"""


def model_card(about):
    splits = {"test": "", "valid": ", on which the epoch was chosen"}
    figures = "\n".join(f"| {k} ({about['images'][k]:,} images{what}) | {100 * about[k]['top1']:.2f} % | {100 * about[k]['top5']:.2f} % |"
                        for k, what in splits.items() if about[k])
    commands = "\n".join(f"    {o}" for o in about["commands"])
    packages = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    return f"""
# {about["arch"]} on {about["dataset"]}

An image classifier of {about["parameters"]:,} parameters for pictures of {about["size"]} x {about["size"]} pixels, trained with fastai by sifar.

| images | top-1 | top-5 |
|---|---|---|
{figures}

## How to make it again

With sifar at commit {about["git_commit"] or "(not known)"}, seed {about["seed"]}, {about["epochs"]} epochs on {about["images"]["train"]:,} images:

{commands}

It was trained with {packages}.

## What it is not

It knows only these {len(about["classes"])} classes, and calls every picture one of them; a high probability is no promise. It saw small pictures of
single things, and is worse on anything else. It is meant for learning and for showing, not for decisions about people.

Classes: {", ".join(about["classes"])}.

`learner.pkl` is a fastai learner, written as a recipe and weights: `sifar.load_learner` reads it without unpickling anything, and compares its SHA-256 with `model.json`.
"""


def check_push(repo):
    "The token of Hugging Face, of `hf auth login` or the environment variable HF_TOKEN. Errors: UserError where there is none, or `repo` is not USER/NAME."
    from huggingface_hub import get_token
    if repo.count("/") != 1 or not all(repo.split("/")): raise UserError(f"--push {repo}: it should be USER/NAME.")
    if token := get_token(): return token
    raise UserError("--push needs a token of Hugging Face that may write: run hf auth login, or set HF_TOKEN.")


def push_space(run, repo):
    "Upload the Space of `run` to `repo`, USER/NAME on Hugging Face, which is made where it is not there. Errors: UserError."
    from huggingface_hub import HfApi
    token = check_push(repo)
    with tempfile.TemporaryDirectory() as folder:
        write_space(run, folder)
        try:
            url = HfApi().create_repo(repo, repo_type="space", space_sdk="gradio", exist_ok=True)
            HfApi().upload_folder(repo_id=repo, folder_path=folder, repo_type="space", delete_patterns="sifar/*", commit_message="The Space of an exported run")
        except Exception as e:              # of its own, of its HTTP client, of its transfer library, of the system
            reason = " ".join(str(e).split()).replace(token, "[token]")[:200]
            raise UserError(f"Hugging Face did not take {repo} ({type(e).__name__}: {reason}): mend that and push again.") from None
    log.info("%s is on line; its first start takes some minutes", url)
