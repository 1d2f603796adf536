// FFCV includes all of OpenCV and links what opencv4.pc lists, but calls only these two modules.
// With this header and the opencv4.pc beside it on PKG_CONFIG_PATH, libopencv-core-dev and
// libopencv-imgproc-dev (46 MiB) are enough to build it, in place of libopencv-dev (640 MB).
#pragma once
#include <opencv2/core.hpp>
#include <opencv2/imgproc.hpp>
