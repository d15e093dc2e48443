_base_ = 'mmdet::_base_/default_runtime.py'

# answers for mmcv._ext and registers the backbones: all that a pipeline needs of mmvig
custom_imports = dict(imports=['mmvig'], allow_failed_imports=False)

default_hooks = dict(checkpoint=dict(max_keep_ckpts=2, save_best='auto'))
randomness = dict(seed=0)
