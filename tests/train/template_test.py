"""A run keeps the template that made its texts, and the day that it was told."""

import json
import shutil

from jaxpeft import cli, template
from jaxpeft.files import write_json
from jaxpeft.template import FILE, JINJA, Template
from jaxpeft.train import config
from jaxpeft.train.begin import train
from jaxpeft.train.prepare import prepare
from tests import runs

DATED = "{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}.{% endfor %}"


def test_a_run_goes_on_tomorrow_with_todays_texts(files, cache, tmp_path, monkeypatch):
    own = tmp_path / "files"
    shutil.copytree(files, own)
    rows = [{"instruction": f"{i}+1", "output": "b"} for i in range(6)]
    (own / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (own / "mine.jinja").write_text(DATED)
    changes = {"eval_data": None, "steps": 1, "batch_size": 2, "template": str(own / "mine.jinja")}
    args = runs.arguments(own, tmp_path / "run", **changes)
    monkeypatch.setattr(template, "today", lambda: "2026-03-01")
    args.out.mkdir()
    write_json(args.out / config.FILE, prepare(args).document)
    monkeypatch.setattr(template, "today", lambda: "2026-03-02")
    (own / "mine.jinja").rename(own / "other.jinja")  # it is compared by what it holds
    train(runs.arguments(own, args.out, **{**changes, "template": str(own / "other.jinja"), "resume": True}))
    expected = Template("chat", "2026-03-01", DATED)
    assert template.find(args.out / "adapter") == expected
    assert cli.main(["export", "--run", str(args.out), "--out", str(tmp_path / "exported")]) == 0
    assert template.find(tmp_path / "exported") == expected
    merged = ["--model", str(own / "model"), "--adapter", str(tmp_path / "exported"), "--out", str(tmp_path / "merged")]
    assert cli.main(["merge", *merged]) == 0
    assert (tmp_path / "merged" / JINJA).read_text() == DATED
    assert (tmp_path / "merged" / FILE).is_file()
