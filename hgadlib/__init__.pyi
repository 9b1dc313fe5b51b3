from .config import Config as Config
from .config import load_config as load_config
from .datasets import load_dataset as load_dataset
from .datasets.check import check as check
from .detector import Detector as Detector
from .detector import Prediction as Prediction
from .errors import InputError as InputError
from .features.backbone import Backbone as Backbone
from .features.backbone import build_backbone as build_backbone
from .features.extract import dataset_features as dataset_features
from .flow import FeatureFlow as FeatureFlow
from .losses import entropy_loss as entropy_loss
from .losses import hgad_losses as hgad_losses
from .losses import inter_class_nll as inter_class_nll
from .losses import intra_class_nll as intra_class_nll
from .losses import mutual_information_loss as mutual_information_loss
from .mixture import GaussianPrior as GaussianPrior
from .mixture import HierarchicalGaussianMixture as HierarchicalGaussianMixture
from .model import HGAD as HGAD
from .runs.directory import RunDirectory as RunDirectory
from .runs.experiment import finish_run as finish_run
from .runs.experiment import train_model as train_model
from .runs.inputs import prepare as prepare
from .scoring import anomaly_maps as anomaly_maps
from .scoring import image_scores as image_scores
from .training import fit as fit

__version__: str
