"""Image-caption data sets as they are downloaded, read into one list of records for `pack`.

Known layouts: Flickr30k and Flickr8k (Karpathy JSON over csv over token file), COCO annotations,
plain csv; or a recipe that names the parts (`shards/*.yaml`, also known by name). Whatever a
file says is checked.
"""

from mmscale.data.members import image_id_of
from mmscale.data.sources.read import read_source
from mmscale.data.sources.records import Record, Rejection, Source

__all__ = ["Record", "Rejection", "Source", "image_id_of", "read_source"]
