"""Play one episode of the environment with random actions."""

import sys

import gymnasium

import rlkd.envs  # registers the environments


def main(num_windows: int = 6) -> None:
    """Print reward and accuracy of every window."""
    env = gymnasium.make("rlkd/DistillationFlat-v0", num_windows=num_windows)
    env.action_space.seed(0)
    env.reset(seed=0)
    done, total = False, 0.0
    while not done:
        _, reward, terminated, truncated, info = env.step(env.action_space.sample())
        done, total = terminated or truncated, total + float(reward)
        print(f"reward {reward:+.3f}, validation accuracy {info['accuracy']:.3f}, MACs {info['macs_ratio']:.2f}")
    print(f"return {total:+.3f}: the gain of J in {rlkd.envs.FLAT_ENV_ID}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
