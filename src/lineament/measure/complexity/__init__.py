"""How hard features are to read, and what they do: V-information through depth and training, importance, flow, redundancy, robustness."""
