"""What Hydra finds at every start; the work is done in `moeprune.app`, imported when it is needed."""
