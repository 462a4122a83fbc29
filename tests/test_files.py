"""Files of the user stay as they are, whatever lies in a run folder; and no run disturbs another."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from conftest import COLD, LONG, SHORT
from test_train import ROOT, assert_same_run, command, failure, files, history, run, start, weights

from sifar import UserError, load_learner
from sifar.cli import one_line_errors
from sifar.files import read_json, read_table, write_file, write_json
from sifar.log import log, log_to_screen
from sifar.runs import report
from sifar.runs.load import last_state, load_run
from sifar.runs.run import Run
from sifar.runs.start import locked

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links, named pipes and signals")


@pytest.fixture
def mine(tmp_path):
    "A file of the user, which nothing may change."
    path = tmp_path / "mine"
    path.write_text("mine")
    yield path
    assert path.read_text() == "mine"


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path, mine):
    (tmp_path / "a").symlink_to(mine)
    (tmp_path / "a.tmp").symlink_to(mine)
    write_file(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and not (tmp_path / "a").is_symlink()
    assert sorted(o.name for o in tmp_path.iterdir()) == ["a", "a.tmp", "mine"]


def test_a_json_file_has_a_list_of_numbers_in_one_line_and_all_else_as_it_was(tmp_path):
    content = {"counts": [1, -2, 3.5e-8], "stats": [[0.5, 1], [2]], "names": ["a [1,\n  2]", "b"], "none": []}
    write_json(tmp_path / "a.json", content)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == content and '"counts": [1, -2, 3.5e-08],' in text.split("\n")[1]


def test_links_and_files_of_the_user_in_a_run_folder_are_left_alone(finished, mine):
    names = "report.html.tmp", "metrics.json.tmp", "config.json.tmp", "history.csv.tmp", "models/last.pth.tmp"
    for name in names:
        (finished / name).symlink_to(mine)
    (finished / "notes").mkdir()
    own = [finished / o for o in ("mine.tmp", "notes/mine.tmp", ".notes-1.tmp", "notes/config.json")]
    for path in own:
        path.write_text("mine")
    run("--resume", finished, "--epochs", 5)
    report.main([str(finished)])
    assert all((finished / name).is_symlink() for name in names)
    assert [path.read_text() for path in own] == ["mine"] * 4


@pytest.mark.parametrize("name", ["training_log.txt", "models", "plots", ".lock"])
def test_a_run_folder_in_which_a_link_takes_a_place_is_refused(finished, mine, tmp_path, capsys, name):
    path = finished / name
    if path.exists():
        path.rename(tmp_path / "aside")
    path.symlink_to(tmp_path if name in ("models", "plots") else mine)
    before = files(tmp_path)
    assert f"{path} should be a" in failure(capsys, "--resume", finished, "--epochs", 5)
    assert files(tmp_path) == before


def test_what_a_killed_run_left_half_written_is_removed(finished):
    end = "-0123456789abcdef.tmp"
    left = [finished / o for o in (f".config.json{end}", f"models/.last.pth{end}")]
    other = finished / f".report.html{end}"  # a report may be writing this now
    for path in (*left, other):
        path.write_text("half")
    run("--resume", finished)
    assert not any(path.exists() for path in left) and other.exists()
    os.utime(other, (0, 0))
    run("--resume", finished)
    assert not other.exists()


def test_what_was_trained_stays_where_a_checkpoint_is_deleted_meanwhile(tmp_path):
    process = start(*SHORT, "--runs", tmp_path, "--name", "a", until="valid  top-1")
    (tmp_path / "digits" / "a" / "models" / "last.pth").unlink()
    process.send_signal(signal.SIGINT)
    process.communicate()
    names = [o.name for o in files(tmp_path / "digits" / "a")]
    assert {"best.pth", "history.csv", "training_log.txt", "config.json"} <= set(names)


def test_a_folder_that_takes_the_place_of_a_run_is_left_alone(tmp_path):
    process = start(*LONG, "--runs", tmp_path, "--name", "a")
    path, moved = tmp_path / "digits" / "a", tmp_path / "moved"
    path.rename(moved)
    path.mkdir()
    for name in ("metrics.json", "history.csv", "config.json", "x.tmp"):
        (path / name).write_text("mine")
    _, err = process.communicate(timeout=60)
    # the second, where it looked between the two steps above
    said = f"{path} is another folder now", f"No such file or directory ({path}"
    assert process.returncode == 2 and err.count("\n") == 1 and any(o in err for o in said)
    assert {o.name: o.read_text() for o in path.iterdir()} == dict.fromkeys(
        ("metrics.json", "history.csv", "config.json", "x.tmp"), "mine"
    )
    assert weights(moved)["epoch"] <= 1


OUTLIVED = """
import os, signal, sys, time
from pathlib import Path
from sifar.runs.start import locked
with locked(Path(sys.argv[1])):
    if not os.fork(): print(os.getpid(), flush=True), os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked as POSIX does it")
def test_a_killed_training_goes_on_while_its_workers_still_live(tmp_path):
    started = [COLD, "-c", OUTLIVED, str(tmp_path)]
    with subprocess.Popen(started, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        worker = int(process.stdout.readline())
        assert process.wait() == -signal.SIGKILL
        with locked(tmp_path), pytest.raises(UserError, match="in use"), locked(tmp_path):
            pass
        os.kill(worker, signal.SIGKILL)


def test_a_second_training_is_refused_also_where_the_lock_is_deleted(tmp_path, capsys):
    process = start(*LONG, "--runs", tmp_path, "--name", "a")
    path = tmp_path / "digits" / "a"
    try:
        assert "is in use by another training" in failure(capsys, "--resume", path)
        (path / ".lock").unlink()
        assert "is in use by another training" in failure(capsys, "--resume", path)
    finally:
        process.kill()
    assert process.communicate()[1] == "" and len(history(path)) >= 1


def test_reports_exports_and_a_training_of_one_run_go_on_at_once(finished, undisturbed):
    commands = (
        *([sys.executable, "-W", "ignore", "-m", "sifar.report", finished] for _ in range(2)),
        *([sys.executable, "-W", "ignore", ROOT / "export.py", finished] for _ in range(2)),
        command("--resume", finished),
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*map(str, o)], cwd=ROOT, **pipes) for o in commands]
    ends = [(process.communicate()[1], process.returncode) for process in started]
    # as a training begins, it removes the figures, and then an export is told that there are none
    assert all(code == 0 or "is not finished" in err for err, code in ends), ends
    assert [code for _, code in ends[:2]] == [0, 0] and ends[-1][1] == 0
    assert_same_run(undisturbed, finished)
    assert not [o for o in finished.iterdir() if o.name.endswith(".tmp") or "sifar-export" in o.name]
    if (finished / "learner.pkl").exists():
        load_learner(finished)


# ---- what would be another run ----


@pytest.mark.parametrize("key, value", [("seed", 7), ("lr", 0.2), ("bs", 32), ("epochs", 3), ("aug", "weak")])
def test_settings_that_were_changed_in_a_run_folder_are_noticed(finished, capsys, key, value):
    about = json.loads((finished / "config.json").read_text())
    about["settings"][key] = value
    (finished / "config.json").write_text(json.dumps(about))
    before = (finished / "history.csv").read_bytes()
    assert f"config.json was changed: it says --{key} {value} (was" in failure(capsys, "--resume", finished)
    assert (finished / "history.csv").read_bytes() == before


@pytest.mark.parametrize(
    "part, key, change",
    [
        ("data", "vocab", lambda o: [o[1], o[0], *o[2:]]),
        ("data", "stats", lambda o: [[0.5] * 3, [0.25] * 3]),
        ("data", "superclasses", lambda o: ["x"] * 10),
        ("settings", "smoothing", lambda o: 0.2),
    ],
)
def test_what_was_changed_in_a_run_folder_is_not_exported(finished, part, key, change):
    about = json.loads((finished / "config.json").read_text())
    about[part][key] = change(about[part][key])
    (finished / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=f"config.json was changed: it.* (--)?{key} "):
        load_run(finished, images=False)


def replace_best(run):
    "Put other weights in the place of the best ones."
    best = run / "models" / "best.pth"
    state = torch.load(best, weights_only=True)
    torch.save({k: v + 0.001 if v.is_floating_point() else v for k, v in state.items()}, best)
    return best


def test_weights_of_another_epoch_in_place_of_the_best_are_noticed(finished, capsys):
    best = replace_best(finished)
    assert f"{best} is damaged or was replaced" in failure(capsys, "--resume", finished, "--epochs", 5)
    with pytest.raises(UserError, match="was replaced"):
        load_run(finished)


def test_a_run_that_was_killed_between_its_two_checkpoints_goes_on(finished):
    "As if a fifth epoch had been the best, and the process had ended before it wrote last.pth."
    replace_best(finished)
    rows = (finished / "history.csv").read_text().splitlines()
    ahead = rows[-1].split(",")
    ahead[0], ahead[3] = "5", "0.99"
    (finished / "history.csv").write_text("\n".join([*rows, ",".join(ahead)]) + "\n")
    run("--resume", finished, "--epochs", 5)
    assert [o["epoch"] for o in history(finished)] == ["1", "2", "3", "4", "5"]


# ---- what a run folder, a terminal and a name may hold ----


@pytest.mark.parametrize("name", ["config.json", "history.csv", "metrics.json", "models/last.pth"])
def test_a_named_pipe_is_no_file_and_nobody_waits_for_it(finished, name):
    (finished / name).unlink()
    os.mkfifo(finished / name)
    with pytest.raises(UserError, match="is no"):
        run_of = Run(finished)
        run_of.history(), run_of.metrics(), last_state(finished)


@pytest.mark.parametrize(
    "text",
    ["[" * 10**6, '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": 1e999}', f'{{"a": {"9" * 5000}}}', " " * 2**23],
    ids=["deep", "NaN", "twice", "infinite", "long", "large"],
)
def test_json_that_is_not_plain_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    "change",
    [
        {"best_epoch": "<script>"},
        {"epochs": "<script>"},
        {"seed": "<script>"},
        {"seconds": 1e300},
        {"images": {"train": -1, "valid": 1, "test": 1}},
        {"test": {"top1": "1", "top5": 1.0, "loss": 1.0}},
    ],
)
def test_figures_that_are_none_are_refused(finished, change):
    metrics = json.loads((finished / "metrics.json").read_text())
    (finished / "metrics.json").write_text(json.dumps({**metrics, **change}))
    with pytest.raises(UserError, match="metrics.json is damaged"):
        Run(finished).metrics()


def test_no_name_steers_the_terminal(tmp_path, capsys):
    assert failure(capsys, "--resume", tmp_path / "\x1b[2J\u202ea\n\udcff").count("\\") == 4
    log_to_screen()
    log.info("%s", "a\x1b[2J\rb\x9b")
    assert capsys.readouterr().out.endswith("  a\\x1b[2J\\rb\\x9b\n")


def test_a_run_whose_name_is_no_text_has_a_report(tmp_path):
    name = os.fsdecode(b"\xff\xfe")
    run(*SHORT, "--runs", tmp_path / name, "--name", name)
    report.main([str(tmp_path / name / "digits" / name)])
    assert r"\udcff\udcfe" in (tmp_path / name / "digits" / name / "report.html").read_text()


def test_where_no_file_may_be_written_there_is_a_word(tmp_path):
    # coverage would write a file too, and complain
    env = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE")}
    with open(tmp_path / "out", "w") as out:
        done = subprocess.run(
            command(*SHORT, "--runs", tmp_path / "runs"),
            env=env,
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
        )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("sifar: File too large")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_command_whose_streams_are_closed_ends_as_any_other(closed):
    for args, code in (["--help"], 0), (["--nope"], 2):
        line = ["sh", "-c", f'"$0" "$@" {closed}', COLD, str(ROOT / "train.py"), *args]
        done = subprocess.run(line, capture_output=True, text=True)
        assert done.returncode == code and "Traceback" not in done.stderr
        if code and "2>" not in closed:
            assert done.stderr.startswith("sifar: Unknown flag '--nope'")


def test_lines_that_a_full_disk_does_not_take_are_told_at_the_end(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit, match="2"), one_line_errors():
            log_to_screen()
            log.info("cat 99 %")
            done = True
    assert done and "Not all lines could be shown ([Errno 28] No space left" in capsys.readouterr().err


def test_help_that_a_full_disk_does_not_take_is_an_error():
    line = ["sh", "-c", '"$0" "$1" --help > /dev/full', COLD, str(ROOT / "train.py")]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("sifar: No space left on device")


def test_what_is_no_table_is_not_waited_for_and_not_read_whole(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "zeros.csv").symlink_to("/dev/zero")
    (tmp_path / "huge.csv").touch()
    os.truncate(tmp_path / "huge.csv", 10**12)
    for name, words in ("pipe", "no plain file"), ("zeros", "no plain file"), ("huge", "more than"):
        with pytest.raises(UserError, match=words):
            read_table(tmp_path / f"{name}.csv")
