"""Networks that decide a schedule before the training begins."""
