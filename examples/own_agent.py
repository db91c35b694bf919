"""Train an agent of your own with plain stable-baselines3, and let it steer a distillation."""

import sys
import tempfile

from stable_baselines3 import PPO

import rlkd


def main(num_students: int = 32, num_iterations: int = 8) -> None:
    """Learn for a few iterations, save the policy, distil under it."""
    env = rlkd.make_sb3_env(num_students=num_students, num_windows=6, train={"steps_per_window": 10})
    size = num_students * env.num_steps
    agent = PPO("MlpPolicy", env, n_steps=env.num_steps, batch_size=size, policy_kwargs={"net_arch": [32, 32]}, seed=0)
    agent.learn(num_iterations * size)
    with tempfile.TemporaryDirectory() as folder:
        rlkd.save_policy(rlkd.policy_from_sb3(agent), folder, {"agent": "examples/own_agent.py"})
        options = {"num_windows": 6, "train.steps_per_window": 10}
        result = rlkd.distil(data="digits", policy=folder, options=options)
    print(f"J {result.metrics['score']:.3f}, accuracy {result.metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
