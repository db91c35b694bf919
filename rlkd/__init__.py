"""rlkd: knowledge distillation whose training loop is driven by a learned policy.

The core (this package less `envs`, `agents`, `cli`) distils a student under given controls and knows
nothing of reinforcement learning. Imports run core <- envs <- agents <- cli.
"""

__version__ = "0.1.0"
