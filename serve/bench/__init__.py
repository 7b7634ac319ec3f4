"""Cache policies side by side: quality, retrieval, speed and memory; command ``bench``."""
