"""What sets the controls: PPO and its policy bundle, baseline controllers, search, and the paired comparison."""

if __name__ == "agents":
    raise ImportError("import this package as rlkd.agents, not as agents")
