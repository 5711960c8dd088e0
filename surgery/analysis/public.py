"""The public names of `surgery.analysis`, all of them and nothing else."""

import surgery.analysis.metrics as metrics  # noqa: F401 (a public name; `from surgery.analysis import` would come back here)
from surgery.analysis.ablation import Study as Study
from surgery.analysis.ablation import ablation_study as ablation_study
from surgery.analysis.ablation import cumulative_ablation as cumulative_ablation
from surgery.analysis.compatible import compatibility as compatibility
from surgery.analysis.detectors import detect_heads as detect_heads
from surgery.analysis.effects import verify_effect as verify_effect
from surgery.analysis.gradients import check_gradients as check_gradients
from surgery.analysis.importance import Importance as Importance
from surgery.analysis.importance import head_importance as head_importance
from surgery.analysis.logit_attribution import direct_logit_attribution as direct_logit_attribution
from surgery.analysis.metrics import Metric as Metric
from surgery.analysis.patching import activation_patching as activation_patching
from surgery.analysis.paths import path_patching as path_patching
from surgery.analysis.steering import discover_vector as discover_vector
from surgery.analysis.structure import composition as composition
from surgery.analysis.structure import copying_scores as copying_scores
from surgery.analysis.sweep import Sweep as Sweep
