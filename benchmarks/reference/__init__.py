"""How the reference target `deploy/models/mix-moe-11m` is made: data, training recipe, held-out losses."""
