"""What makes a backbone compute less otherwise than by widths, and how much it then computes (`flops`).

Whole layers or states that are gone (`depth`, `lightweight`, `slicing`), other neurons for each token (`contextual`),
less for images' tokens (`dropping`, `visual`).
"""
