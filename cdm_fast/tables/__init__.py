"""Tables of numbers: their densities, density ratios and mutual information, as scikit-learn estimators."""

from cdm_fast.tables.density import CDMDensity as CDMDensity
from cdm_fast.tables.information import ConfidenceInterval as ConfidenceInterval
from cdm_fast.tables.information import MutualInformation as MutualInformation
from cdm_fast.tables.ratio import DensityRatio as DensityRatio
from cdm_fast.tables.ratio import TwoSampleTest as TwoSampleTest
from cdm_fast.tables.ratio import effective_sample_size as effective_sample_size
from cdm_fast.tables.ratio import log_density_ratio as log_density_ratio
