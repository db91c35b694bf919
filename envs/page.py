"""The page of the environment, made from the tables that the code reads: class docstring and docs/environment.md."""

from dataclasses import fields

from rlkd.envs.action import CONTROLS, SCALARS, ControlConfig
from rlkd.envs.observation import TABLE, VERSION
from rlkd.envs.reward import KAPPA, MAX_PENALTY

MEANING = {
    "temperature": "softening of teacher and student, on a logarithmic scale",
    "feature_keep": "share of the inputs kept, on a logarithmic scale",
    "unit_keep": "share of each block's units kept, on a logarithmic scale",
    "exit_threshold": "confidence at which a sample leaves early",
    "learning_rate": "step size, on a logarithmic scale",
}
HISTORY = (
    "v0: actions move the controls from where they are, observations are relative to the goal (version "
    f"{VERSION} of the schema, which is part of a policy bundle)."
)
EXAMPLE = """import gymnasium

import rlkd.envs  # registers the environments

env = gymnasium.make("rlkd/DistillationFlat-v0", num_windows=2, train={"steps_per_window": 3})
observation, info = env.reset(seed=0)
done = False
while not done:
    observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
    done = terminated or truncated
print(sorted(info)[:3])"""


def action_table() -> str:
    """Return the table of actions: place in the flat action, key of the Dict, bounds, what an action of 1 does."""
    config = ControlConfig()
    ranges = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "step"}
    rows = ["| number | key | control | bounds | range of the control |", "|---|---|---|---|---|"]
    for i, name in enumerate(CONTROLS):
        if name.startswith("weight_"):
            key, what = "loss_weights", "loss weight, as a logit from -4 to 4 whose softmax gives the weights"
        elif name in SCALARS:
            low, high = ranges.get(name, (None, None))
            key = name
            what = MEANING[name] + (f", {low:g} to {high:g}" if low is not None else ", from chance to 1")
        else:
            key, what = "exit_kind", "the largest of the three decides: no early exit, all at the first, by confidence"
        rows.append(f"| {i} | `{key}` | `{name}` | -1 to 1 | {what} |")
    return "\n".join(rows)


def observation_table() -> str:
    """Return the table of observations: number, name, bounds, meaning."""
    rows = ["| number | name | bounds | meaning |", "|---|---|---|---|"]
    entries = [(name, bounds, text) for group in TABLE.values() for name, (bounds, text) in group.items()]
    for i, (name, (low, high), text) in enumerate(entries):
        rows.append(f"| {i} | `{name}` | {low:g} to {high:g} | {text} |")
    return "\n".join(rows)


def page() -> str:
    """Return the whole page in Markdown."""
    step = ControlConfig().step
    return f"""# The environment

`rlkd/Distillation-v0` trains one student: an episode is its training, a step is one *window* of optimizer steps under
one set of controls. `rlkd/DistillationFlat-v0` is the same with one flat Box of {len(CONTROLS)} actions, as the
algorithms of stable-baselines3 need it.

## Actions

A Dict of boxes, or one flat Box [{len(CONTROLS)}]. An action moves a control from where it is, by up to {step:g} of its
range (`controls.step`); zero leaves it there. Controls that would break a cost limit are lowered until they fit.

{action_table()}

## Observations

A Box [{sum(len(group) for group in TABLE.values())}]. Accuracies are differences to the floor of the goal, costs are
ratios to the dense student, so nothing depends on the data set or the architecture.

{observation_table()}

## Reward

The change of J on validation data, so the rewards of an episode sum to its gain:

J = w_acc A + w_lat (1 - latency / dense) + w_eng (1 - energy / dense)
- min({MAX_PENALTY:g}, {KAPPA:g} max(0, floor - A))

Never training loss, never test data.

Its weights need no code: `--preference.accuracy 0.9` and so on. For another formula, edit `score` in `envs/reward.py`
of a clone and learn a policy anew (`make train`): the bundled one learned with this formula. The window that ships is
chosen by the same score.

## Episode end

After `num_windows` windows, which are observed, an episode is `terminated`. A student whose losses, gradients or
parameters are not finite goes back to its last good window, `train.max_rollbacks` times; then its episode ends with the
worst J.
`truncated` is used by the lock-step population alone, for a student that began late.

## Example

```python
{EXAMPLE}
```

Every field of `rlkd.EnvConfig` is a keyword of `gymnasium.make`, nested ones as mappings.

## Version history

{HISTORY}
"""
