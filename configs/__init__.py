if __name__ == "configs":
    raise ImportError("import this package as rlkd.configs, not as configs")
