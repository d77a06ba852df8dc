"""Using trained networks: evaluate, predict, export, measure how fast they are."""
