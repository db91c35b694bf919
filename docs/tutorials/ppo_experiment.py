# %% [markdown]
# # Launch and read a PPO experiment
#
# `rlkd train` learns a policy: an episode is the training of one small student, the reward is the change of J on validation
# data. `rlkd train --config default` takes about ten minutes on two cores; this notebook runs a very small experiment, whose
# policy is worth nothing, to show where everything is.

# %%
import json
import tempfile
from pathlib import Path

import numpy as np

from rlkd.cli.main import main

run = Path(tempfile.mkdtemp()) / "run"
small = {
    "train": {"steps_per_window": 3, "batch_size": 16},
    "teacher": {"num_samples": [40, 897], "num_steps": 60},
    "num_windows": 3,
}
options = {
    "--config": "smoke",
    "--out": str(run),
    "--scenarios": json.dumps([small]),
    "--validation": json.dumps([{**small, "student": {"widths": [12, 8]}}]),
    "--search.num_settings": "3",
    "--comparison.num_tasks": "8",
    "--ppo.num_iterations": "4",
    "--ppo.evaluate_every": "1",
}
code = main(["train", *(word for option in options.items() for word in option)])
print("exit code", code)

# %% [markdown]
# ## The reward curve
#
# `evaluations.npz` has the arrays of stable-baselines3's `EvalCallback`; each evaluation trains the same students of the
# validation scenarios, which the policy does not learn on. TensorBoard has the same under `eval/mean_reward`, the rollouts
# under `rollout/ep_rew_mean`: `tensorboard --logdir runs`.

# %%
evaluations = np.load(run / "evaluations.npz")
for steps, reward in zip(evaluations["timesteps"], evaluations["results"].mean(1), strict=True):
    print(f"{steps:>5} environment steps: mean reward {reward:+.3f}")

# %% [markdown]
# ## What a run leaves behind
#
# `best_model/` is the policy of the best evaluation so far, `policy/` the one that ships, `student/` a student that was
# distilled under it, `report.html` the page to read first.

# %%
print(sorted(path.name for path in run.iterdir()))
row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
print({name: round(row[name], 3) for name in ("return", "score", "accuracy", "latency_ratio")})

# %% [markdown]
# ## Is it better than a baseline?
#
# `result.json` compares it with baselines on held-out tasks that nothing has seen, paired, with intervals.

# %%
result = json.loads((run / "result.json").read_text())
for name, row in result["paired"].items():
    low, high = row["ci95"]
    print(f"{name:<20} difference in J {row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]")

# %% [markdown]
# ## Next
#
# - other tasks, students and horizons: `scenarios` in a YAML file ([Learn a policy](../train.md));
# - another reward: `score` in `envs/reward.py` is one function ([the environment](../environment.md#reward));
# - another algorithm: `--agent.algorithm a2c|recurrent_ppo|sac|tqc`; several seeds: `--seeds 0,1,2`;
# - hyperparameters: `rlkd tune --config default --num_trials 20`.
