"""Pictures of heads and of what cuts do: heat maps, attention patterns, effects, estimates against exact numbers."""

from surgery.plots.curves import effect_bars as effect_bars
from surgery.plots.curves import effect_by_position as effect_by_position
from surgery.plots.curves import importance_against_exact as importance_against_exact
from surgery.plots.curves import lines as lines
from surgery.plots.curves import measures_by_position as measures_by_position
from surgery.plots.interference import block_bars as block_bars
from surgery.plots.interference import block_maps as block_maps
from surgery.plots.maps import Named as Named
from surgery.plots.maps import head_maps as head_maps
from surgery.plots.maps import heat_maps as heat_maps
from surgery.plots.maps import heatmaps as heatmaps
from surgery.plots.maps import pair_map as pair_map
from surgery.plots.notebook import attention_view as attention_view
from surgery.plots.patterns import pattern_pictures as pattern_pictures
from surgery.plots.style import FORMATS as FORMATS
from surgery.plots.style import save as save
