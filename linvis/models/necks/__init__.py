from linvis.models.necks.simple_fpn import SimpleFeaturePyramid

__all__ = ['SimpleFeaturePyramid']
