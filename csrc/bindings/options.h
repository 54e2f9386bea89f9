// The op's options by the names that Python uses.
#pragma once

#include <stdexcept>
#include <string>

#include "cam.h"

namespace gradcampp {

inline Method parse_method(const std::string& name) {
  if (name == "gradcampp") return Method::kGradCamPlusPlus;
  if (name == "gradcampp_normalized") return Method::kGradCamPlusPlusNormalized;
  if (name == "gradcam") return Method::kGradCam;
  if (name == "xgradcam") return Method::kXGradCam;
  if (name == "layercam") return Method::kLayerCam;
  if (name == "hirescam") return Method::kHiResCam;
  if (name == "gradcam_elementwise") return Method::kGradCamElementwise;
  if (name == "attention") return Method::kAttention;
  throw std::runtime_error("no kernel for the method '" + name + "'");
}

inline Normalize parse_normalize(const std::string& name) {
  if (name == "minmax") return Normalize::kMinMax;
  if (name == "max") return Normalize::kMax;
  if (name == "none") return Normalize::kNone;
  throw std::runtime_error("normalize must be 'minmax', 'max' or 'none', got '" + name + "'");
}

inline Interpolation parse_interpolation(const std::string& name) {
  if (name == "linear") return Interpolation::kLinear;
  if (name == "nearest") return Interpolation::kNearest;
  throw std::runtime_error("interpolation must be 'linear' or 'nearest', got '" + name + "'");
}

}  // namespace gradcampp
