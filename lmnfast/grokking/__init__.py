"""The paper's grokking experiment (arXiv 2310.05918, section 3): tasks, model, training, figures of a run."""
