"""What is submitted: one short file per stage, beside the recipes."""
