"""The titles that readers know phases, families, extractors and objectives by."""

PHASES = {
    "pretrain": "Pretraining",
    "finetune": "Fine-tuning",
    "blind": "The blind twin",
}
# What readers call them; others go by their own name.
FAMILIES = {"visualbert": "VisualBERT", "lxmert": "LXMERT", "vilbert": "ViLBERT"}
EXTRACTORS = {
    "pixels": "raw pixels",
    "grid": "a grid of frozen CNN features",
    "regions": "regions found by a frozen detector",
    "segments": "segments found by a frozen Mask R-CNN",
    "patches": "patch tokens of a frozen vision transformer",
    "imported": "published features",
}
OBJECTIVES = {
    "mlm": "masked words",
    "itm": "image–text matching",
    "lm": "next words",
    "mrm": "masked regions",
    "itc": "image–text contrast",
    "qa": "questions",
    "distill": "a teacher's outputs",
    "answer": "answers",
    "vqa": "answers",
    "caption": "captions",
}
