"""Set the controls of a training: PPO and its policy bundle, baselines, searches, and their paired comparison."""

if __name__ == "agents":
    raise ImportError("import this package as rlkd.agents, not as agents")
