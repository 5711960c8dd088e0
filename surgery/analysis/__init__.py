"""From cuts to findings: effects, ablation studies, importance of heads, patching, steering, structure."""
