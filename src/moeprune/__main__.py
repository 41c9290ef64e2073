"""``python -m moeprune``."""

from moeprune.app.main import main

if __name__ == "__main__":
    main()
