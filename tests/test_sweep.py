from bench import sweep


def test_a_sweep_writes_a_row_a_training_and_goes_on_where_it_broke_off(tmp_path, monkeypatch):
    path = tmp_path / "sweep.csv"

    def rows(*flags):
        args = "sweep", str(path), "--preset", "smoke", "--seeds", "1", "2", "--", *flags
        monkeypatch.setattr("sys.argv", [*args])
        sweep.main()
        return sweep.read_rows(path)

    short = "--epochs 1 --bs 512 --sizes 8"
    first = rows(short)
    assert [(o["flags"], o["seed"]) for o in first] == [(short, "1"), (short, "2")]
    assert all(0 < float(o["top1"]) < 100 and float(o["seconds"]) > 0 for o in first)
    more = rows(short, f"{short} --smoothing 0.3")
    assert more[:2] == first and len(more) == 4 and float(more[2]["loss"]) != float(first[0]["loss"])
