"""What exists only to reproduce the papers: models and worlds to edit, experiments, records, figures, verdicts."""
