"""The command study: equal terms, no run twice, a report that says what was measured."""

import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jax_densevit import evaluate, study
from jax_densevit.configuration import ConfigDict
from jax_densevit.data.sources import create_source
from jax_densevit.errors import UserError
from jax_densevit.experiment import load
from jax_densevit.studies import measure, run
from jax_densevit.studies.plan import make_plans, read_study
from jax_densevit.training import trainer

STUDY = Path(__file__).parents[1] / "configs" / "study.py"
CONFIG = '''
from jax_densevit.configuration import ConfigDict, default_config, default_evaluator, words
from jax_densevit.studies.plan import default_model, default_study


def get_config(arg=""):
    """Two tiny models on digits, and on photos."""
    words(arg)
    study = default_study()
    study.learning_rates, study.probe, study.evaluations = (1e-3, 1e-2), 0.5, 2
    study.loss_examples, study.sheet = 16, 2
    for name, model in (
        ("seq2seg", {"name": "seq2seg", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_size": 16,
                     "patch_size": 4, "image_size": 16}),
        ("setr", {"name": "setr_naive", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_size": 16,
                  "patch_size": 4, "head_channels": 8, "taps": (1,), "auxiliary": False}),
    ):
        study.models[name] = default_model()
        study.models[name].model = ConfigDict(model)
    study.models.seq2seg.title = "Seq2Seg"
    study.models.setr.per_task = ConfigDict({"colorization": {"model": {"head_channels": 4}}})
    for name, data, best in (
        ("segmentation", {"name": "digit_scenes", "size": (16, 16), "digits": (1, 1), "scale": (8, 12)}, "val/mIoU"),
        ("colorization", {"name": "sample_photos", "side": 48}, "-val/charbonnier"),
    ):
        config = default_config()
        config.task = ConfigDict({"name": name})
        config.data.train = ConfigDict({**data, "split": "train"})
        config.data.crop = (16, 16)
        config.update({"steps": 4, "batch_size": 8})
        config.optimizer.warmup_steps = 2
        config.checkpoint.update({"every": 2, "keep": 1, "best": best})
        config.log.every = 1
        more = {"length": 6} if name == "segmentation" else {"tiles": (16, 16)}
        for split in ("val", "test"):
            config.eval[split] = default_evaluator()
            config.eval[split].data = ConfigDict({**data, **more, "split": split})
        study.tasks[name] = config
    return study
'''


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "tiny_study.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture(scope="module")
def done(config, tmp_path_factory):
    """The folder of a study that ran without a break."""
    folder = tmp_path_factory.mktemp("study")
    assert study.main([f"--config={config}", "--workdir", str(folder), "--quiet"]) == 0
    return folder


def results(folder):
    return json.loads((folder / "results.json").read_text())["results"]


def table(report, heading):
    """The rows of the first table behind a heading, as lists of cells."""
    lines = report[report.index(heading) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


def test_plans_differ_in_the_model_alone(config):
    plans = make_plans(read_study(config))
    assert [(plan.task, plan.model) for plan in plans] == [
        ("segmentation", "seq2seg"),
        ("segmentation", "setr"),
        ("colorization", "seq2seg"),
        ("colorization", "setr"),
    ]
    for one, other in (plans[:2], plans[2:]):
        a, b = one.run(1e-3).to_dict(), other.run(1e-3).to_dict()
        assert a.pop("model") != b.pop("model") and a == b
        assert list(a["eval"]) == ["val"] and one.test == other.test and one.test.data.split == "test"
    assert plans[3].config.model.head_channels == 4 and plans[1].config.model.head_channels == 8
    probe = plans[0].probe(1e-2)
    assert (probe.steps, probe.optimizer.warmup_steps, probe.optimizer.learning_rate) == (2, 1, 1e-2)
    assert plans[0].config.eval.val.every == 2


def test_budget_in_flops(config):
    overrides = {"budget": "flops", "tasks.segmentation.steps": "400"}
    first, setr, *_ = make_plans(read_study(config, overrides))
    assert first.config.steps == 400 and setr.config.steps == round(400 * first.macs / setr.macs) != 400
    assert abs(setr.flops / first.flops - 1) < 0.5 / setr.config.steps
    assert setr.config.optimizer.warmup_steps == round(2 * setr.config.steps / 400)
    given, *_ = make_plans(read_study(config, {**overrides, "flops": str(first.flops / 2)}))
    assert given.config.steps == 200
    with pytest.raises(UserError, match="is no step of seq2seg"):
        make_plans(read_study(config, {**overrides, "flops": "1.0"}))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"evaluation": "3"}, "did you mean 'evaluations'"),
        ({"tasks.segmentation.optimiser.b1": "1"}, "has no section 'optimiser'; did you mean 'optimizer'"),
        ({"tasks.segmentation.stepss": "3"}, "did you mean 'steps'"),
        ({"models.seq2seg.titel": "x"}, "did you mean 'title'"),
        ({"models.seq2seg.model.hidden_siz": "3"}, "did you mean 'hidden_size'"),
        ({"models.setr.per_task.colorization.optimizer": "3"}, "there is no such field|no config field"),
        ({"budget": "time"}, "no budget of a study named 'time'"),
        ({"flops": "1e9"}, "needs config.budget='flops'"),
        ({"learning_rates": "(1e-3, 1e-3)"}, "must be different rates"),
        ({"tasks.segmentation.checkpoint.best": "test/mIoU"}, "must be a score of val"),
        ({"tasks.segmentation.checkpoint.best": "vall/mIoU"}, "names no evaluator"),
        ({"tasks.segmentation.task.name": "palette"}, "no table for a task named 'palette'"),
        ({"tasks.segmentation.batch_size": "0"}, "config.tasks.segmentation.batch_size=0"),
    ],
)
def test_mistakes_are_named(config, overrides, message):
    with pytest.raises(UserError, match=message):
        read_study(config, overrides)


def test_mistakes_of_the_command_line(config, tmp_path):
    with pytest.raises(UserError, match="--workdir is missing"):
        study.main([f"--config={config}"])
    assert study.main([f"--config={config}", "--dry_run", "--workdir", str(tmp_path / "no")]) == 0
    assert not (tmp_path / "no").exists()


def test_the_report(done):
    report = (done / "report.md").read_text()
    found = {(r["task"], r["model"]): r for r in results(done)}
    assert len(found) == 4 and "Not finished" not in report
    rows = table(report, "## Segmentation")
    assert rows[0][:6] == ["Model", "# of Parameters", "Training Loss", "Validation Loss", "Test Top-1", "Test mIoU"]
    assert [row[0] for row in rows[1:]] == ["Seq2Seg", "setr", "*most frequent class*"]
    first = found["segmentation", "seq2seg"]
    assert rows[1][1:6] == [
        f"{first['parameters']:,}",
        f"{first['training_loss']:.4f}",
        f"{first['validation_loss']:.4f}",
        f"{first['test']['pixel_accuracy']:.1%}",
        f"{first['test']['mIoU']:.1%}",
    ]
    rows = table(report, "## Colorization")
    assert [row[0] for row in rows[1:]] == ["Seq2Seg", "setr", "*all gray*"]
    gray = found["colorization", "seq2seg"]["baselines"]["all gray"]
    assert rows[3][4:6] == [f"{gray['L1']:.4f}", f"{gray['charbonnier']:.4f}"]
    assert rows[3][3] == f"{found['colorization', 'seq2seg']['validation_baselines']['all gray']['charbonnier']:.4f}"
    for task in ("segmentation", "colorization"):
        for kind in ("curves", "sheet"):
            assert f"]({task}_{kind}.png)" in report
            with Image.open(done / f"{task}_{kind}.png") as picture:
                assert min(picture.size) > 300 and len(picture.convert("RGB").getcolors(1 << 22)) > 20
    for r in found.values():
        assert [probe["steps"] for probe in r["probes"]] == [2, 2] and r["steps"] == 4 and r["step"] in (2, 4)
        scores = {probe["learning_rate"]: probe["score"] for probe in r["probes"]}
        pick = max if r["task"] == "segmentation" else min
        assert scores[r["learning_rate"]] == pick(scores.values())
        assert f"**{scores[r['learning_rate']]:.4f}**" in report
        assert r["training_seconds"] > 0 and r["inference_images_per_second"] > 0 and r["gmacs"] > 0


def test_the_test_split_is_measured_once_on_the_best_step(done):
    for r in results(done):
        folder = done / r["task"] / r["model"]
        best = json.loads((folder / "run" / "best.json").read_text())[-1]
        assert r["step"] == best["step"]
        assert [path.name for path in folder.rglob("test-*.json")] == [f"test-{best['step']}.json"]
        lines = (folder / "run" / "metrics.jsonl").read_text()
        assert '"evaluator": "val"' in lines and '"evaluator": "test"' not in lines
        assert not (folder / "probe_0.001" / "checkpoints").exists()


def test_losses_are_those_of_the_task_in_evaluation_mode(done):
    """Against cross-entropy written out in NumPy, and in batches of other sizes."""
    loaded = load(done / "segmentation" / "seq2seg" / "run")
    source = create_source(**loaded.config.eval.val.data.to_dict())
    examples = [source.read(i) for i in range(len(source))]
    batch = {name: np.stack([example[name] for example in examples]) for name in ("image", "labels")}
    logits = np.asarray(loaded.forward(*loaded.task.inputs(batch)).logits, np.float64)
    chosen = np.take_along_axis(logits, batch["labels"][..., None].astype(int), -1)[..., 0]
    expected = (np.log(np.exp(logits).sum(-1)) - chosen).mean()
    (found,) = (r for r in results(done) if (r["task"], r["model"]) == ("segmentation", "seq2seg"))
    assert abs(found["validation_loss"] - expected) < 1e-5
    parts = [{name: value[i:j] for name, value in batch.items()} for i, j in ((0, 2), (2, 6))]
    assert abs(measure.mean_loss(loaded, parts, lambda: False) - expected) < 1e-5


def test_a_run_is_a_workdir_like_any_other(done, capsys):
    workdir = done / "colorization" / "setr" / "run"
    assert evaluate.main(["--workdir", str(workdir)]) == 0
    out = capsys.readouterr().out
    assert "all gray" in out and "charbonnier" in out


def test_nothing_is_done_twice(config, done, monkeypatch, capsys):
    before = results(done)
    monkeypatch.setattr(run, "train", None)
    monkeypatch.setattr(run, "measure", None)
    assert study.main([f"--config={config}", "--workdir", str(done)]) == 0
    assert results(done) == before and "report.md" in capsys.readouterr().out


def test_another_config_is_refused(config, done):
    for change, message in (
        ("tasks.segmentation.optimizer.weight_decay=0.5", "weight_decay: 0.0 -> 0.5"),
        ("tasks.colorization.eval.test.limit=3", r"limit: 0 -> 3"),
        ("probe=1.0", "steps: 2 -> 4"),
        ("learning_rates=(1e-3, 1e-2, 1e-1)", "learning_rates: "),
    ):
        with pytest.raises(UserError, match=f"made with another config .*{message}"):
            study.main([f"--config={config}", "--workdir", str(done), f"--config.{change}"])


def test_stopped_and_gone_on(config, done, tmp_path, monkeypatch, capsys):
    """SIGTERM in an evaluation of a full run: 75, and the same command ends with the same numbers."""
    arguments = [f"--config={config}", "--workdir", str(tmp_path), "--config.models.setr.title=S"]
    original = trainer.evaluate

    def interrupted(*args, **kwargs):
        if (tmp_path / "segmentation" / "seq2seg" / "run").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(trainer, "evaluate", interrupted)
    assert study.main(arguments) == 75
    assert not (tmp_path / "report.md").exists()
    monkeypatch.setattr(trainer, "evaluate", original)
    capsys.readouterr()

    measured = run.measure

    def interrupted_behind(*args, **kwargs):
        found = measured(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(run, "measure", interrupted_behind)
    assert study.main(arguments) == 75
    out = capsys.readouterr().out
    assert "Resuming from step 2 of 4" in out and "probe of learning rate" not in out
    report = (tmp_path / "report.md").read_text()
    assert "**Not finished:** S (segmentation), Seq2Seg (colorization), S (colorization)" in report
    (first,) = results(tmp_path)
    (whole,) = (r for r in results(done) if (r["task"], r["model"]) == ("segmentation", "seq2seg"))
    for key in ("step", "learning_rate", "training_loss", "validation_loss", "validation", "test", "probes"):
        assert first[key] == whole[key], key


def test_a_rate_that_diverges_is_not_chosen(config, tmp_path, monkeypatch):
    plan = make_plans(read_study(config))[0]
    trained = []

    def train(experiment, folder, **options):
        trained.append(folder.name)
        raise trainer.Diverged("Step 1 is not finite.")

    monkeypatch.setattr(run, "train", train)
    options = {"say": lambda line: None, "finished": lambda: None, "loss_examples": 8, "sheet": 1}
    with pytest.raises(UserError, match=r"every learning rate diverges \(0.001, 0.01\)"):
        run.run_study([plan], tmp_path, **options)
    assert trained == ["probe_0.001", "probe_0.01"]
    with pytest.raises(UserError, match="every learning rate"):  # known already
        run.run_study([plan], tmp_path, **options)
    assert len(trained) == 2
    probes = [{"learning_rate": 1e-2, "score": None}, {"learning_rate": 1e-3, "score": 0.5}]
    probes.append({"learning_rate": 3e-3, "score": 0.5})
    assert run.best_rate(probes, "val/mIoU") == run.best_rate(probes, "-val/L1") == 1e-3
    probes.append({"learning_rate": 1e-4, "score": 0.4})
    assert run.best_rate(probes, "val/mIoU") == 1e-3 and run.best_rate(probes, "-val/L1") == 1e-4


@pytest.mark.parametrize(
    ("arg", "tasks", "models"),
    [
        ("quick", ["segmentation", "colorization"], 4),
        ("both,quick,seq2seg,vitseg,setr", ["segmentation", "colorization"], 7),
        ("segmentation,quick", ["segmentation"], 4),
        ("segmentation,skip,quick", ["segmentation"], 2),
    ],
)
def test_the_study_at_quick_size(arg, tasks, models):
    plans = make_plans(read_study(f"{STUDY}:{arg}"))
    assert list(dict.fromkeys(plan.task for plan in plans)) == tasks and len(plans) == models * len(tasks)
    for plan in plans:
        assert plan.config.data.crop == (64, 64) and plan.config.steps >= 100


def test_the_study_in_full():
    for arg in ("", "both,seq2seg,vitseg,setr", "nuclei", "small", "colorization"):
        config = read_study(f"{STUDY}:{arg}")
        assert config.models.unet.model == ConfigDict({"name": "unet", "variant": "64"}) or arg == "small"
        for task in config.tasks.values():
            assert task.eval.test.data.root == task.data.train.root
    skips = {name: entry.model for name, entry in read_study(f"{STUDY}:skip").models.items()}
    assert {name: model.variant for name, model in skips.items()} == {"seq2seg": "skip", "seq2seg_no_skip": "no_skip"}
    with pytest.raises(UserError, match="did you mean 'segmentation'"):
        read_study(f"{STUDY}:segmentaton")
    header = STUDY.read_text().split('"""')[1]
    for field in ("Command:", "Words:", "Hardware:", "Expected:", "Run here:"):
        assert field in header
    for word in (
        "both",
        "segmentation",
        "colorization",
        "seq2seg",
        "vitseg",
        "setr",
        "nuclei",
        "skip",
        "small",
        "quick",
    ):
        assert re.search(rf"\b{word}\b", header)
