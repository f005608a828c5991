"""What the forms of a plan cost, on the embedded model: the experiment's own step and words."""

import pytest

from experiments.memory import common, remat_forms
from jaxpeft import assets


@pytest.mark.slow
def test_tiny_steps_compiled_on_a_cpu(monkeypatch, tmp_path):
    """Both forms keep and compute the same; what the table and the verdicts say is what was measured."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(remat_forms, "PLANS", ("blocks",))
    monkeypatch.setattr(
        remat_forms, "SIZES", {"geometry": str(assets.MODEL), "rank": 2, "batch_size": 32, "seq_len": 128}
    )
    figures = common.Figures("remat_forms", remat_forms.measure)
    loops, policy = rows = remat_forms.collect(figures, ["cpu"], [remat_forms.running()])
    assert [row["form"] for row in rows] == ["loops", "policy"] and remat_forms.measured(figures) == [
        remat_forms.running()
    ]
    assert all(loops[name] == policy[name] > 0 for name in ("kept", "flops", "recompute_flops"))
    (size,) = remat_forms.more(rows).values()
    assert size == pytest.approx((policy["memory"]["temporaries"] - loops["memory"]["temporaries"]) / 2**30)
    assert size > 0  # 4096 tokens at once, where the loops take 2048
    text = remat_forms.document(rows)
    assert (
        "Both forms keep the same bytes" in text
        and f"cpu: the policy's temporaries are larger by {size:.1f} to {size:.1f} GiB" in text
    )
    assert text.count("| cpu, `blocks`, ") == 2
