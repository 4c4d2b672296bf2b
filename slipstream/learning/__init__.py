"""Learning from observations: replay, distillation and the scoring of candidates."""
