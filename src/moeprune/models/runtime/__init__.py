"""What a pruned model computes with. Nothing here imports moeprune: every pruned checkpoint carries these files along,
so that it loads where moeprune is not installed."""
