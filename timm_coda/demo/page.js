// Runs once when the page has loaded, inside a function to which Gradio gives `element`, `trigger` and `watch`.
// The numbers are read from the map itself, not from the colours: what is shown is the sum of the array's values.
let map = null; // the contributions of what is shown
let region = null; // {row, column, side}: what is read
let kept = false; // a click keeps the region when the pointer moves on
let focus = null; // the button that has the focus is made anew with the rest

const places = () => element.querySelectorAll(".coda-picture");
const field = (name) => element.querySelector(`input[name=${name}]`);
const clamp = (number, least, most) => Math.min(Math.max(number, least), most);

function load() {
  const viewer = element.querySelector(".coda-viewer");
  if (!viewer) {
    map = region = null;
    return;
  }
  const bytes = Uint8Array.from(atob(viewer.dataset.map), (letter) => letter.charCodeAt(0));
  const values = new Float32Array(bytes.buffer);
  const before = map;
  map = { values, rows: +viewer.dataset.rows, columns: +viewer.dataset.columns, title: viewer.dataset.title };
  map.all = sums(0, map.rows, 0, map.columns);
  if (!before || before.rows !== map.rows || before.columns !== map.columns) region = null;
  kept = kept && region !== null;
  if (focus) element.querySelector(`[data-key="${focus}"]`)?.focus();
  focus = null;
  if (region) field("side").value = region.side;
  show(true);
}

function sums(top, bottom, left, right) {
  let positive = 0;
  let negative = 0;
  for (let row = top; row < bottom; row++) {
    for (let column = left; column < right; column++) {
      const value = map.values[row * map.columns + column];
      if (value > 0) positive += value;
      else negative += value;
    }
  }
  return { positive, negative };
}

function show(fill) {
  if (!region) return;
  const output = element.querySelector("output");
  const top = Math.max(0, region.row - Math.floor((region.side - 1) / 2));
  const left = Math.max(0, region.column - Math.floor((region.side - 1) / 2));
  const bottom = Math.min(map.rows, region.row + Math.floor(region.side / 2) + 1);
  const right = Math.min(map.columns, region.column + Math.floor(region.side / 2) + 1);
  const { positive, negative } = sums(top, bottom, left, right);
  const value = positive + negative;
  const share = (part, whole) => `${whole ? ((100 * part) / whole).toPrecision(3) : "0"} %`;
  const span = (word, first, end) => (end - first > 1 ? `${word}s ${first}\u2013${end - 1}` : `${word} ${first}`);
  const sign = value < 0 ? "\u2212" : "+";
  const where = `${span("Row", top, bottom)}, ${span("column", left, right)}`;
  const number = document.createElement("strong");
  number.textContent = `${sign}${Math.abs(value).toPrecision(3)} logits`;
  output.replaceChildren(
    `${where}:`,
    number,
    ` for ${map.title}: ${share(positive, map.all.positive)} of all evidence for it, ` +
      `${share(negative, map.all.negative)} of all against it.`,
  );
  output.dataset.value = value;
  for (const place of places()) {
    const marker = place.querySelector(".coda-marker");
    marker.hidden = false;
    marker.classList.toggle("coda-kept", kept);
    marker.style.top = `${(100 * top) / map.rows}%`;
    marker.style.left = `${(100 * left) / map.columns}%`;
    marker.style.height = `${(100 * (bottom - top)) / map.rows}%`;
    marker.style.width = `${(100 * (right - left)) / map.columns}%`;
  }
  if (fill) {
    field("row").value = region.row;
    field("column").value = region.column;
  }
}

function pointed(event) {
  const place = event.target.closest?.(".coda-picture");
  if (!place || !map) return null;
  const box = place.getBoundingClientRect();
  const row = Math.floor((map.rows * (event.clientY - box.top)) / box.height);
  const column = Math.floor((map.columns * (event.clientX - box.left)) / box.width);
  const side = clamp(Math.round(+field("side").value) || 1, 1, Math.max(map.rows, map.columns));
  return { row: clamp(row, 0, map.rows - 1), column: clamp(column, 0, map.columns - 1), side };
}

element.addEventListener("pointermove", (event) => {
  const place = kept ? null : pointed(event);
  if (!place) return;
  region = place;
  show(true);
});

element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-target]");
  if (button) {
    focus = button.dataset.key;
    trigger("choose", { target_class: +button.dataset.target, versus_class: +button.dataset.versus });
    return;
  }
  const place = pointed(event);
  if (!place) return;
  kept = !(kept && place.row === region.row && place.column === region.column);
  region = place;
  show(true);
});

element.addEventListener("input", (event) => {
  if (!map || !event.target.closest(".coda-region")) return;
  const [row, column, side] = ["row", "column", "side"].map((name) => field(name).value);
  if (row === "" || column === "" || side === "") return;
  region = {
    row: clamp(Math.round(+row), 0, map.rows - 1),
    column: clamp(Math.round(+column), 0, map.columns - 1),
    side: clamp(Math.round(+side), 1, Math.max(map.rows, map.columns)),
  };
  kept = true;
  show(false);
});

watch("value", load);
load();
