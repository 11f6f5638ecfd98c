// From values to places between 0 and 1, and ticks to read them by.
const LOG_UNITS = new Set(["keys", "tokens", "ratio", "norm"]);

// Heavy tails are read better on a logarithmic scale.
function wantsLog(column) {
  const values = sortedValues(column);
  if (!LOG_UNITS.has(column.unit) || !values.length || values[0] <= 0) return false;
  return values[values.length - 1] / quantile(values, 0.5) > 8;
}

function modesOf(column) {
  const values = sortedValues(column);
  return values.length && values[0] > 0 ? ["linear", "log", "rank"] : ["linear", "rank"];
}

// { at(value) -> 0..1, ticks: [{ at, text }], mode, both }; both: for colours, two around zero
function scaleFor(column, wanted = "auto", forColour = false) {
  const values = sortedValues(column);
  const least = values.length ? values[0] : 0;
  const most = values.length ? values[values.length - 1] : 1;
  let mode = wanted === "auto" ? (wantsLog(column) ? "log" : "linear") : wanted;
  if (!modesOf(column).includes(mode)) mode = "linear";
  if (mode === "rank") {
    const at = (value) => {
      let below = 0;
      let same = 0;
      for (const v of values) {
        if (v < value) below += 1;
        else if (v === value) same += 1;
        else break;
      }
      return values.length < 2 ? 0.5 : (below + (same - 1) / 2) / (values.length - 1);
    };
    const ticks = [0, 0.25, 0.5, 0.75, 1].map((share) => ({
      at: share, text: number(quantile(values, share)),
    }));
    return { at, ticks, mode, both: false };
  }
  if (mode === "log") {
    const low = Math.log10(least);
    const high = Math.log10(most) > low ? Math.log10(most) : low + 1;
    const at = (value) => (Math.log10(Math.max(value, least)) - low) / (high - low);
    return { at, ticks: logTicks(least, most, at), mode, both: false };
  }
  if (forColour && least < 0 && most > 0) {
    const size = Math.max(-least, most);
    const at = (value) => 0.5 + value / (2 * size);
    return { at, ticks: linearTicks(-size, size, at), mode, both: true };
  }
  const low = least >= 0 && least < most * 0.6 ? 0 : least;
  const high = column.unit === "share" && most > 0.6 && most <= 1 ? 1 : most;
  const span = high > low ? high - low : 1;
  const at = (value) => (value - low) / span;
  return { at, ticks: linearTicks(low, low + span, at), mode, both: false };
}

// For effects, a few of which are far larger than all others: linear around zero, logarithmic
// beyond the median size, on both sides.
function signedScale(column) {
  const values = sortedValues(column);
  const sizes = values.map(Math.abs).sort((a, b) => a - b);
  const most = sizes.at(-1) || 1;
  const bend = quantile(sizes, 0.5) || most;
  if (most / bend < 8) return scaleFor(column);
  const bent = (value) => Math.asinh(value / bend);
  const [low, high] = [Math.min(0, bent(values[0])), Math.max(0, bent(values.at(-1)))];
  const at = (value) => (bent(value) - low) / (high - low);
  const ticks = [{ at: at(0), text: "0" }];
  for (let p = Math.floor(Math.log10(most)); 10 ** p > bend; p -= 1) {
    for (const value of [-(10 ** p), 10 ** p]) {
      if (value >= values[0] && value <= values.at(-1)) ticks.push({ at: at(value), text: tickText(value) });
    }
  }
  return { at, ticks, mode: "signed log", both: false };
}

function linearTicks(low, high, at, wanted = 5) {
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) {
    ticks.push({ at: at(k * step), text: tickText(k * step) });
  }
  return ticks;
}

function logTicks(least, most, at) {
  const decades = Math.log10(most / least);
  const factors = decades > 3 ? [1] : decades > 1.2 ? [1, 3] : [1, 2, 5];
  const ticks = [];
  for (let p = Math.floor(Math.log10(least)); p <= Math.ceil(Math.log10(most)); p += 1) {
    for (const factor of factors) {
      const value = factor * 10 ** p;
      if (value >= least * 0.999 && value <= most * 1.001) {
        ticks.push({ at: at(value), text: tickText(value) });
      }
    }
  }
  return ticks;
}
