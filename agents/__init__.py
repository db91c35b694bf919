if __name__ == "agents":
    raise ImportError("import this package as rlkd.agents, not as agents")
