"""What sets the controls: PPO and its policy bundle, rival controllers, search, and the paired comparison."""

if __name__ == "agents":
    raise ImportError("import this package as rlkd.agents, not as agents")
