"""The public names of `surgery.analysis.interference`, all of them and nothing else."""

from surgery.analysis.interference.collecting import collect as collect
from surgery.analysis.interference.fisher import Fisher as Fisher
from surgery.analysis.interference.gradients import Gradients as Gradients
from surgery.analysis.interference.intervals import Intervals as Intervals
from surgery.analysis.interference.intervals import two_way_bootstrap as two_way_bootstrap
from surgery.analysis.interference.kernels import KERNELS as KERNELS
from surgery.analysis.interference.maps import Interference as Interference
from surgery.analysis.interference.maps import heatmap as heatmap
from surgery.analysis.interference.scores import sample_scores as sample_scores
from surgery.analysis.interference.signed import sign_flip_test as sign_flip_test
from surgery.analysis.interference.statistics import Scores as Scores
from surgery.analysis.interference.statistics import permutation_test as permutation_test
from surgery.analysis.interference.study import conflict_test as conflict_test
from surgery.analysis.interference.study import overlap_test as overlap_test
from surgery.analysis.interference.tested import Tested as Tested
