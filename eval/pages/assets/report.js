// Filters, plots and the link between them. The rows of the table are in the page; the same rows, as numbers, in #data.
(() => {
  const { rows, series, groups, full, colours } = JSON.parse(document.getElementById("data").textContent);
  const get = (id) => document.getElementById(id);
  const SYMBOLS = [["circle", "\u25CF"], ["square", "\u25A0"], ["diamond", "\u25C6"], ["triangle-up", "\u25B2"], ["triangle-down", "\u25BC"]];
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const isFull = (place) => full[place];
  const colour = (place) => (isFull(place) ? css("--text") : colours[place % colours.length]);
  // Symbols change with colours, so that neighbours differ in both.
  const symbol = (place) => (isFull(place) ? ["star", "\u2605"] : SYMBOLS[place % SYMBOLS.length]);
  const lines = [...get("results").tBodies[0].rows].sort((a, b) => a.dataset.row - b.dataset.row);
  const texts = lines.map((line) => line.textContent.toLowerCase());
  const chips = [...document.querySelectorAll("[data-series]")];
  const escape = (text) => String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
  const fixed = (value, digits) => (value === null ? "n/a" : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }));
  const several = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

  function chosen() {
    const [benchmark, model, extent] = ["benchmark", "model", "extent"].map((id) => get(id).value);
    const words = get("words").value.toLowerCase().split(/\s+/).filter(Boolean);
    const ticked = new Set(chips.filter((chip) => chip.checked).map((chip) => Number(chip.dataset.series)));
    return rows.map((row, i) => i).filter((i) => {
      const row = rows[i];
      return (!benchmark || row.benchmark === benchmark) && (!model || row.model === model) && ticked.has(row.series)
        && (!extent || row.partial === (extent === "partial")) && words.every((word) => texts[i].includes(word));
    });
  }

  // Fill a list of choices, most results first, and keep the choice where it is still there.
  function offer(select, values, label) {
    const counts = new Map();
    values.forEach((value) => counts.set(value, (counts.get(value) ?? 0) + 1));
    const before = select.value;
    const options = [...counts].sort((a, b) => b[1] - a[1]);
    select.replaceChildren(...options.map(([value, count]) => new Option(`${label(value)} (${several(count, "result")})`, value)));
    if (options.some(([value]) => String(value) === before)) select.value = before;
    select.disabled = options.length < 2;
    return select.value;
  }

  function hover(row) {
    const sure = row.low === null || row.high === null ? "" : ` [${fixed(row.low, 1)}, ${fixed(row.high, 1)}]`;
    const time = row.ttft === null ? "n/a" : `${fixed(row.ttft, row.ttft < 10 ? 2 : 0)} ms (${row.batch === 1 ? "one question" : `batch of ${row.batch}`})`;
    return [
      `<b>${escape(series[row.series])}</b>${row.size === "" ? "" : `, budget ${row.size}`}`,
      `${escape(row.benchmark)}, ${escape(row.model)}`,
      `${escape(row.metric)} ${fixed(row.score, 1)}${row.unit === "%" ? " %" : " points"}${sure}`,
      `${row.percent === null ? "no result of full" : `${fixed(row.percent, 1)} % of full`}, ${several(row.questions, "question")}${row.partial ? " (part)" : ""}`,
      `${fixed(row.tokens, 1)} tokens per layer, TTFT ${time}`,
      `KV ${fixed(row.kv, 1)} MB, ${fixed(row.gflop, 2)} GFLOP`,
      escape(row.folder),
    ].join("<br>");
  }

  // One trace per method. `joined` draws a line through the results of a method, from few tokens to many.
  function traces(points, x, y, joined, bars) {
    const places = [...new Set(points.map((i) => rows[i].series))].sort((a, b) => a - b);
    return places.map((place) => {
      const own = points.filter((i) => rows[i].series === place).sort((a, b) => rows[a].tokens - rows[b].tokens);
      const error = (end) => own.map((i) => (rows[i].low === null || rows[i].high === null ? 0 : Math.abs(rows[i][end] - rows[i][y])));
      return {
        x: own.map((i) => rows[i][x]), y: own.map((i) => rows[i][y]), customdata: own, text: own.map((i) => hover(rows[i])),
        name: escape(series[place]), mode: joined && own.length > 1 ? "lines+markers" : "markers", hovertemplate: "%{text}<extra></extra>",
        line: { color: colour(place), width: 1.5 },
        marker: { color: colour(place), symbol: symbol(place)[0], size: isFull(place) ? 12 : 8 },
        ...(bars && { error_y: { type: "data", symmetric: false, array: error("high"), arrayminus: error("low"), color: colour(place) + (isFull(place) ? "" : "90"), thickness: 1, width: 3 } }),
      };
    });
  }

  // Ticks of a logarithmic axis at 1, 2 and 5, so that a small span has some.
  function ticks(values) {
    const found = [];
    for (let power = Math.floor(Math.log10(Math.min(...values))); power <= Math.ceil(Math.log10(Math.max(...values))); power++)
      [1, 2, 5].forEach((first) => found.push(first * 10 ** power));
    return found.map((value) => Number(value.toPrecision(1)));
  }

  function axis(values, title) {
    const plain = { title: { text: escape(title) }, gridcolor: css("--line"), linecolor: css("--line"), zeroline: false, automargin: true };
    if (!values) return plain;
    const least = Math.min(...values);
    // Values of one order of magnitude need no logarithm, and zero has none.
    if (!values.length || least <= 0 || Math.max(...values) < 5 * least) return { ...plain, rangemode: "tozero" };
    const marks = ticks(values);
    return { ...plain, type: "log", tickvals: marks, ticktext: marks.map((mark) => mark.toLocaleString("en")) };
  }

  function draw(id, points, x, y, titles, { joined = true, bars = true, line = null } = {}) {
    const layout = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--text"), family: getComputedStyle(document.body).fontFamily, size: 12 },
      margin: { l: 50, r: 12, t: 30, b: 44 }, showlegend: false, hovermode: "closest", dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      hoverlabel: { bgcolor: css("--panel"), bordercolor: css("--line"), font: { color: css("--text") }, align: "left" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--quiet"), activecolor: css("--accent") },
      xaxis: axis(points.map((i) => rows[i][x]), titles[0]), yaxis: axis(null, titles[1]),
      shapes: line === null ? [] : [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: line, y1: line, line: { color: css("--quiet"), width: 1, dash: "dot" } }],
      annotations: points.length ? [] : [{ text: "no results to draw", xref: "paper", yref: "paper", x: 0.5, y: 0.5, showarrow: false }],
    };
    const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
    Plotly.react(get(id), traces(points, x, y, joined, bars), layout, config);
  }

  const heads = [...get("results").tHead.rows[0].cells].map((head) => head.textContent.trim());

  // Below an opened row stands every column of it, with what is otherwise a tooltip.
  function open(line, wanted) {
    const button = line.querySelector("button");
    if ((button.getAttribute("aria-expanded") === "true") === wanted) return;
    button.setAttribute("aria-expanded", wanted);
    if (!wanted) return line.nextElementSibling.remove();
    const list = document.createElement("dl");
    heads.slice(1).forEach((head, i) => {
      const [pair, term, value, cell] = [..."div dt dd".split(" ").map((name) => document.createElement(name)), line.cells[i + 1]];
      term.textContent = head;
      value.append(...(cell.title ? [cell.textContent, ` (${cell.title})`] : [...cell.childNodes].map((node) => node.cloneNode(true))));
      pair.append(term, value);
      list.append(pair);
    });
    const details = document.createElement("tr");
    details.className = "details";
    details.insertCell().append(list);
    details.cells[0].colSpan = heads.length;
    line.after(details);
  }

  get("results").tBodies[0].addEventListener("click", ({ target }) => {
    const line = target.closest("tr[data-row]");
    if (line && !target.closest("a")) open(line, line.querySelector("button").getAttribute("aria-expanded") !== "true");
  });
  // Before rows are sorted, what is opened closes.
  get("results").tHead.addEventListener("click", () => lines.forEach((line) => open(line, false)), true);

  // A click on a point opens its row.
  function connect(id) {
    get(id).on("plotly_click", ({ points: [point] }) => {
      document.querySelectorAll("tr.found").forEach((line) => line.classList.remove("found"));
      const line = lines[point.customdata];
      line.classList.add("found");
      open(line, true);
      line.scrollIntoView({ block: "center", inline: "start", behavior: "smooth" });
    });
  }

  function update() {
    const shown = chosen();
    const kept = new Set(shown);
    lines.forEach((line, i) => {
      line.hidden = !kept.has(i);
      if (line.hidden) open(line, false);
    });
    get("shown").textContent = `${shown.length.toLocaleString("en")} of ${several(rows.length, "result")} shown.`;
    const group = Number(offer(get("group"), shown.map((i) => rows[i].group), (number) => groups[number]));
    const same = shown.filter((i) => rows[i].group === group && rows[i].score !== null);
    const first = same.length ? rows[same[0]] : null;
    const score = first ? `${first.metric}, ${first.unit}` : "score";
    const reference = same.find((i) => isFull(rows[i].series));
    const line = reference === undefined ? null : rows[reference].score;
    const dotted = line === null ? "" : " The dotted line is full.";
    draw("plot-tokens", same, "tokens", "score", ["visual tokens per layer", score], { line });
    get("caption-tokens").textContent = `${several(same.length, "result")}; bars are 95 % confidence intervals.${dotted}`;

    const timed = offer(get("timed"), same.filter((i) => rows[i].timed !== null).map((i) => rows[i].timed), (text) => text);
    const alike = same.filter((i) => rows[i].timed !== null && rows[i].timed === timed);
    draw("plot-time", alike, "ttft", "score", ["time to first token of a batch, ms", score], { line: alike.includes(reference) ? line : null });
    const left = same.length - alike.length;
    get("caption-time").textContent = `${several(alike.length, "result")} timed under like conditions: model, questions, device, threads, data type and size of batch are the same.`
      + (left ? ` ${several(left, "result")} left out: timed under other conditions, or not at all.` : "")
      + " What else the machine did is not recorded.";

    const costed = shown.filter((i) => rows[i].percent !== null && rows[i].gflop !== null);
    draw("plot-flops", costed, "gflop", "percent", ["GFLOP up to the first token, per question", "% of full"], { joined: false, bars: false, line: 100 });
    const missing = shown.length - costed.length;
    get("caption-flops").textContent = `${several(costed.length, "result")} of all models and benchmarks that the filters leave; vision tower included.`
      + (missing ? ` ${several(missing, "result")} left out: no result of full on the same questions, no score, or no count of operations.` : "");
  }

  chips.forEach((chip) => {
    const mark = chip.parentElement.querySelector(".mark");
    mark.textContent = symbol(Number(chip.dataset.series))[1];
    mark.style.color = isFull(Number(chip.dataset.series)) ? "var(--text)" : colour(Number(chip.dataset.series));
  });
  const tick = (state) => () => { chips.forEach((chip) => { chip.checked = state; }); update(); };
  get("every").addEventListener("click", tick(true));
  get("none").addEventListener("click", tick(false));
  get("filters").addEventListener("input", update);
  get("filters").addEventListener("submit", (event) => event.preventDefault());
  ["group", "timed"].forEach((id) => get(id).addEventListener("input", update));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", update);
  update();
  ["plot-tokens", "plot-time", "plot-flops"].forEach(connect);
})();
