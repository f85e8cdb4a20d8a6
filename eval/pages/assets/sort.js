// Tables of class "sortable": a click on a column's head sorts by it, a second click turns the order round.
// A cell sorts by its data-value, else by its text; numbers before words, empty cells last.
document.querySelectorAll("table.sortable").forEach((table) => {
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  const value = (row, column) => {
    const cell = row.cells[column];
    const text = (cell.dataset.value ?? cell.textContent).trim();
    return { text, number: text === "" ? NaN : Number(text.replace(/[,%]/g, "").split(/\s/)[0]) };
  };
  const compare = (a, b, sign) => {
    if (!a.text || !b.text) return (a.text ? 0 : 1) - (b.text ? 0 : 1);
    const numbers = !Number.isNaN(a.number) - !Number.isNaN(b.number);
    if (numbers) return -numbers;
    return sign * (Number.isNaN(a.number) ? a.text.localeCompare(b.text) : a.number - b.number);
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const body = table.tBodies[0];
      const rows = [...body.rows];
      rows.sort((a, b) => compare(value(a, column), value(b, column), descending ? -1 : 1));
      body.append(...rows);
    });
  });
});
