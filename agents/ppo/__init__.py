"""PPO over the lock-step population, and PPO within one training."""
